"""A checkpoint's tokenizer in the forms that its files have, and whether all who read them get the same ids."""
