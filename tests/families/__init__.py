"""What each family of models can do here, every cell of the table run: `make families` writes docs/families.md."""
