"""`python -m tests.hub --root DIR --port PORT`."""

from tests.hub.server import main

if __name__ == "__main__":
    main()
