"""The step `save`: the trained model is published, with a model card, its provenance and a report page."""
