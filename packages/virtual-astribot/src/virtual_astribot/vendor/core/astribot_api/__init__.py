"""The SDK's folders, as the stand-in has them."""
