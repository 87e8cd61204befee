"""The embedded default model: its corpus, its training, its evaluation, and the checkpoint that Drover ships."""
