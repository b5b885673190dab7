"""The rows of the operator table, by kind; ``edgeprune.deploy.onnx_ops`` says which operator has which."""
