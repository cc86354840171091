"""`tandem size`: what a deployment needs of memory, network and index."""
