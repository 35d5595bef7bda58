"""The pocket world: a small made-up country whose texts and problems train a model without any download."""
