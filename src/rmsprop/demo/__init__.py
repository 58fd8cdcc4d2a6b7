"""`rmsprop demo`: four optimizers train on real data, with figures and a page. Imports optimizer."""
