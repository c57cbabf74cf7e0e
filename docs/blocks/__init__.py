"""What stands in the generated blocks of the docs."""
