"""`serve_policy` under the name that the first documents use; the checkpoint itself says what it is."""

from grasp_cube.serve_policy import main

if __name__ == "__main__":
    main()
