"""Other ways to quantize keys and values, rounded as they store numbers."""
