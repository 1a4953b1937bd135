"""``seco probe``: SVM, kNN and linear classifier on frozen features."""
