"""The demo: a real language model generates text, and is judged on text, through swath's paged cache."""
