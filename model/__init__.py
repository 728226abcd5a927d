"""What training and the service must agree on.

Numbers in, numbers out: numpy and an image decoder, no sockets, clocks or GPU. Only ``bundle.py`` reads files and only
``network.py`` knows torch.
"""
