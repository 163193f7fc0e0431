"""Does what is planned, block by block, and writes down what it measured."""
