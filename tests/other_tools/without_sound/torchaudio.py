"""In the place of torchaudio, whose index build needs CUDA libraries; LLaMA-Factory imports it, rows of text do not."""
