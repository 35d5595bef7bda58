"""The tasks of CORE (DCLM, Li et al. 2024), and Hugging Face models that CORE can score."""
