"""Token reduction: fine-tuning recipes, and methods compared at equal multiply-adds."""
