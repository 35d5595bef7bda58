"""CORE's data (from DCLM, Li et al. 2024), and Hugging Face models that CORE can score."""
