"""The state of an optimizer: slots, loading, matching and shared memory. Imports settings and tensors."""
