"""Networks that transformers lacks, registered with it: importing a file lets AutoModel load folders of that kind."""
