"""What the notebooks show and ask for: plots, widgets, a local hub, rows, the record in SwanLab, the language."""
