"""What probe, retrieval and fine-tuning share: splits, predictions, classes."""
