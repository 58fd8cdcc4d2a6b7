"""`rmsprop race`: optimizers on landscapes of two parameters, as pictures and a page. Imports reference."""
