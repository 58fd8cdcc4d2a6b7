"""What an optimizer keeps: slots, loading and matching of saved state, shared memory. Imports settings, tensors."""
