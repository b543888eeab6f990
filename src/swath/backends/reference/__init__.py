"""Plain torch, attention in float64, straight from the formula: what every other backend is held to."""
