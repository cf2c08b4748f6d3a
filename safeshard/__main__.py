"""`python -m safeshard`: the command line."""

from safeshard.streamer.cli.app import entry

if __name__ == "__main__":
    entry()
