"""
Recipes: the numbers of optimizers and schedules, by name (--recipe). A flag of the same name overrides a number.

`reference` is the recipe of nanochat's first version, and the default. `tuned` reaches the same loss in fewer steps of
pretraining; dev/LOG.md has the evidence so far, and `python -m dev.bench.bench_recipe` repeats the comparison.
"""

REFERENCE = {
    "embedding_lr": 0.2,
    "unembedding_lr": 0.004,
    "matrix_lr": 0.02,
    "weight_decay": 0.0,
    "matrix_decay": 0.0,
    "muon_beta2": 0.0,
    "adam_half_life": 0,
    "warmup_ratio": 0.0,
    "warmdown_ratio": 0.2,
    "final_lr_frac": 0.0,
}
TUNED = REFERENCE | {
    "embedding_lr": 0.4,
    "unembedding_lr": 0.008,
    "matrix_decay": 2.0,
    "muon_beta2": 0.95,
    "adam_half_life": 280_000,  # beta2 0.99 at 4,096 tokens per step, 0.95 from 19,000
    "warmdown_ratio": 0.7,
}
RECIPES = {"tuned": TUNED, "reference": REFERENCE}
