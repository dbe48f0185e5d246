"""Models made from other models. Those of Hugging Face formats are in `taipan.hf.conversion`."""
