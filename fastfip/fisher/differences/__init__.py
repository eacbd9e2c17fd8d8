"""The gradient of the Fisher trace by finite differences, from first derivatives alone."""
