"""Training the minis: three small language models that differ in one thing, how the block after attention is built.

    python -m interp.monet.train monet-mini --data data/corpora/built --out runs/monet-mini --tokens 6M

Read in this order: `recipes` (the three models), `data` (tokenizer, token cache, which tokens at which step),
`schedule` and `muon` (learning rate, optimisers), `loop` (steps, evaluation), `checkpoint` (stop and go on, bit for
bit), `ngram` (the baseline that a language model must beat), `report` (what the shipped weights can do, and their
model card).

Everything that decides the result is a function of (recipe, corpus, seed, step), so a run that was killed and resumed
is the run that was not.
"""
