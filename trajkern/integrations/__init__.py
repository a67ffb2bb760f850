"""trajkern in the trainers and model libraries that people already use."""
