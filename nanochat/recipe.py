"""
Recipes: named settings of optimizers, schedules and data (--recipe). A stage takes those that it has flags for.

A flag overrides the setting of the same name. `reference` is the recipe of nanochat's first version. `tuned`, the
default of pretraining, reaches the same loss in fewer steps; dev/LOG.md has the evidence, and
`python -m dev.bench.bench_recipe` repeats the comparison.
"""

REFERENCE = dict(embedding_lr=0.2, unembedding_lr=0.004, weight_decay=0.0, adam_beta1=0.8, adam_half_life=0)  # AdamW
REFERENCE |= dict(matrix_lr=0.02, matrix_decay=0.0, muon_beta2=0.0, final_momentum=0.95)  # Muon
# Learning rate schedule, order of rows
REFERENCE |= dict(warmup_ratio=0.0, warmdown_ratio=0.2, final_lr_frac=0.0, packing="stream")

# A half-life of 280,000 tokens means beta2 = 0.99 at 4,096 tokens per step, and its minimum, 0.95, from 20,700 on.
TUNED = REFERENCE | dict(embedding_lr=0.4, adam_beta1=0.7, adam_half_life=280_000)
TUNED |= dict(matrix_lr=0.025, matrix_decay=2.0, muon_beta2=0.95, final_momentum=0.85)
TUNED |= dict(warmdown_ratio=0.85, final_lr_frac=0.05, packing="shuffle")

RECIPES = {"tuned": TUNED, "reference": REFERENCE}
