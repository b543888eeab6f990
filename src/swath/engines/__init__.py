"""Serving engines run on swath: adapters that turn an engine's tensors into the nouns and call the operators."""
