"""Vocabulary learning: a tokenizer's own algorithm is continued on a domain's corpus.

    corpus ── words ── symbols ── greedy ── grown tokenizer
                                    ▲             │
                      protected ────┘     measured on a held-out tenth

`corpus` streams texts, `parts` keeps a tenth of them apart, `words` counts what the tokenizer merges within, `symbols`
writes words as ids, `greedy` finds the pieces that save most, `protect` says which it may not take, `grown` writes the
tokenizer, `held_out` measures it; `learning` is the whole in one function, and `job` what a FineTuneJob makes of it.
Neither torch nor weights are needed.
"""
