"""What is known of transformers models: their families, how one is loaded, and what of it is trained."""
