"""`rmsprop demo`: RMSprop, SGD, momentum and Adam trained on real data, with figures and a page. Imports optimizer."""
