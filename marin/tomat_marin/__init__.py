"""Training of tomat's language model on TPUs with Levanter; needs Python 3.12 and no PyTorch."""
