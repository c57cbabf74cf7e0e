"""Wrong inputs of six kinds, made from sound ones and a seed, and what becomes of them."""
