"""Units of memory. No torch: plans and parsers use them, too."""

MIB = 2**20
GIB = 2**30
