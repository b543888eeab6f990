"""The operators: a folder each, holding the public function and one file per backend."""
