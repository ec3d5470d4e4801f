"""Connect the loss to other training frameworks."""
