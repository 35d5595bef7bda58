"""The pocket world: texts and problems about a small fictional country, enough to train a model without a download."""
