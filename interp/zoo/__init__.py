"""Where models come from: the hub, a directory, a GGUF file, the packaged SmolLM2, tiny random families.

`load` is the one way in (`interp.load`); the other modules know how one kind of source becomes a checked
Hugging Face model and a tokenizer. Nothing here touches a model's code or hooks anything.
"""
