"""From packed bytes to tiles inside a kernel: geometry, loads, lookups, rotation factors, single instructions."""
