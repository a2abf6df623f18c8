"""What must be true in the kernel after a cell of a notebook has run, in both languages.

Cell id -> Python expression -> what is wrong otherwise. Here are the bounds of figures that differ a little between
processors, and checks that would teach a reader of the cell nothing. `tools/cell_checks.py` asks the kernel: in every
run of `tools/run_nbval.py`, and before `tools/run_series.py --store` stores anything.
"""

CHECKS: dict[str, dict[str, str]] = {
    # ------------------------------------------------------------------------------------------------- 03 rows
    "03-07a": {"load_rows(mixed) == [messages] * 3": "one of the three forms gives another conversation"},
    "03-37": {
        "not on_both_sides": "an answer of the rows held out as new answers is taught",
        "most_alike < ALIKE": "a question held out has a near-copy in training",
    },
    "03-43": {"not shared": "a test question is in the training file"},
    # ---------------------------------------------------------------------------------------- 04 tokens and labels
    "04-23": {
        r'tokenizer.decode(trained) == "\n我是甄嬛，家父是大理寺少卿甄远道。<|user|>"': (
            "the labels are not the answer and its end"
        ),
    },
    "04-27": {'forged["input_ids"].count(user_token) == 2': "the spelling of a special token has forged a turn"},
    "04-35": {
        'losses["thinking left on"] > 2 * losses["as trained"]': "the prompt with thinking on costs little",
        'losses["tags of another model"] > 2 * losses["as trained"]': "the tags of another model cost little",
        'losses["no template"] > 2 * losses["as trained"]': "a prompt without the template costs little",
    },
    # -------------------------------------------------------------------------------------------------- 05 training
    "05-58": {
        "all(same.values())": "a curve is missing in SwanLab, or has other numbers than the notebook",
        "not same or list(said) == list(in_swanlab)": "the answers were not recorded at every evaluation",
        "not same or all(pictures.values())": "the mask or the picture of both losses was not recorded",
    },
    "05-60": {"not still": "a matrix of the adapter has learned nothing"},
    # ----------------------------------------------------------------------------------------------- 07 failure lab
    "07-21": {"going_on >= 0.5 * len(answers)": "with the wrong terminator most answers stop all the same"},
    "07-25": {"going_on_now == 0": "with the right terminator an answer goes on"},
    "07-26": {"stopped >= 0.8 * len(answers)": "with the right terminator many answers do not stop"},
    "07-33": {
        "low < 0.8": "the run with another text does not learn its text",
        "right <= 3": "the trained answers come although the prompt is another one",
    },
    "07-36": {"right_in_that_text >= right + 3": "the answers were not learned behind the other text either"},
    "07-38": {"right_now >= max(5, right + 3)": "the fixed run does not give the trained answers"},
    "07-52": {
        "reported < 0.7 * on_answers": "labels on the prompt do not make the reported loss look good",
        "reported_now < 0.8 * on_answers": "training on the answers only is not better on the answers",
    },
    "07-57": {
        "final > 1.3 * lowest": "the loss does not stay high after its jump",
        "final > 1.5": "the loss of the run with the high learning rate ends low",
    },
    "07-61": {
        "final_now <= 1.3 * lowest": "the loss of the fixed run jumps, too",
        "final_now < 0.7 * final": "the fixed run is hardly better",
    },
    "07-64": {"slow > 1.0": "LoRA on one weight learns as fast as on all"},
    "07-69": {"learned < 0.5 * slow": "LoRA on all groups does not learn faster"},
    "07-75": {"max(abs(loss - alone) for loss in together) > 0.1": "a neighbour in the row does not change the loss"},
    "07-79": {
        "max(abs(a - b) for a, b in zip(packed, padded)) < 1e-4": "packed and padded losses differ",
        "max(abs(loss - alone) for loss in packed) < 1e-4": "a packed neighbour still changes the loss",
    },
    "07-81": {"min(abs(loss - alone) for loss in half_fixed.values()) > 0.1": "a part of the fix is enough by itself"},
    "07-84b": {"not taught_elsewhere": "a held-out answer is taught"},
    "07-89": {
        "smooth(history)[-1] < 0.1": "ten rows are not learned by heart",
        "watched[-1] > 1.05 * min(watched)": "the held-out loss does not rise",
        "sum(parrots) >= 2": "hardly an answer repeats a trained one",
    },
    "07-95": {
        "watched_now[-1] < 0.99 * min(watched)": "more rows do not lower the held-out loss",
        "watched_now[-1] <= 1.05 * min(watched_now)": "the held-out loss rises with more rows, too",
    },
    "07-94h": {"waiting <= 1": "calls wait for their result although their end was never a label"},
    "07-94l": {"waiting_now >= 4": "calls do not wait although their end is a label"},
    "07-95h": {"found <= 0.2 * len(said)": "thoughts are found although their tags are letters"},
    "07-95l": {"found_now >= 0.8 * len(new_questions)": "thoughts are not found although their tags are tokens"},
    # --------------------------------------------------------------------------------------------------- 09 serving
    "09-07": {
        'differences["expert fastest"] < 1e-5': "the right split does not give peft's update",
        'differences["expert slowest"] > 0.5': "the wrong split is nearly right, so the comparison shows nothing",
    },
    "09-28": {
        'as_peft["llama.cpp, base + adapter"] >= 9': "llama.cpp with the adapter answers otherwise than peft",
        "min(as_peft.values()) >= 5": "a form gives mostly other answers",
    },
    "09-33": {
        '"甄远道" in with_adapter': "with the adapter she does not know her father's name",
        '"甄远道" not in without': "the base knows the name: the switch shows nothing",
    },
    "09-37": {"(by_library == whole_numbers).all()": "the library rounds otherwise than the cell above"},
    "09-41": {
        'losses["Q8_0"] < losses["merged, bf16"] + 0.05': "8 bits cost more than the prose says",
        'losses["Q4_0"] > losses["Q8_0"]': "4 bits cost less than 8",
    },
    "09-49f": {"all(same)": "a file arrived changed"},
}
