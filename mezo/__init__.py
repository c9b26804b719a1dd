"""MeZO: fine-tuning of language models with forward passes only, on fused parameter ops."""
