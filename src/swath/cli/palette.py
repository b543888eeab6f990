"""Colours of the plots: dark enough for text on white, apart in print and for the colour-blind."""

INK, MUTED, FAINT = "#22303a", "#6b7a85", "#c8d1d7"
TONES = ("#0072b2", "#c44e00", "#00795a", "#a1467e", "#7a6a00")
