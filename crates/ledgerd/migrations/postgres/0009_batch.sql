-- The transaction of the last batch, and the owner whose it was: whether one whose commit was not answered is durable is seen here. The server's own word on a
-- number will not do. One that stopped without a checkpoint gives numbers once more whose transactions left no trace, and then tells
-- what became of whoever got the number after that.
ALTER TABLE slots ADD COLUMN batch xid8, ADD COLUMN batch_owner BIGINT;
