"""Several processes that work as one: started together by torchrun, watched, and told of as one."""
