"""The messages of `OpenPiInferenceService`, shared by the server's gateway and the client for older servers."""
