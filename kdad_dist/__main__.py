"""`python -m kdad_dist`: the form of the command that launchers start."""

from kdad_dist.cli.app import main

if __name__ == "__main__":
    main()
