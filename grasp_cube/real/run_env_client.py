"""`run_env_client` under the path that the first documents use."""

from env_client.run_env_client import main

if __name__ == "__main__":
    main()
